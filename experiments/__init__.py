"""Everything around the rooms: lessons, watching runs, the study, the machine."""
