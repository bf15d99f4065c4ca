"""How much each layer keeps: probes of single layers, measured or estimated, and what follows from them."""
