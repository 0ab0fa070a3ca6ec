"""The dashboard at `/ui`: one page that shows who uses what and why requests wait, fed by one stream of events."""
