"""Charts as plain data, drawn by plotly for the screen and by matplotlib for a PNG; tables."""
