"""The patch model of the paper, and ours."""
