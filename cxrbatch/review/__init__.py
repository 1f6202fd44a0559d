"""The review in a browser: work list, images, rounds and reports. Starts without torch, a model or a GPU."""
