"""What a collaboration is worth: metrics, intervals, calibration, and the page that shows them."""
