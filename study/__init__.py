"""What reproduce.py and visualize.py stand on."""
