"""One torch module a group of weights: x through the network, or dW, and what the layers of one pass share."""
