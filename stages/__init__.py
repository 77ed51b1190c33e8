"""Middle floor: the models and the three stages. encode, denoise and decode do not import each other."""
