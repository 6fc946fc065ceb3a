"""A trained adapter over real data: what its autoencoders know, layer by layer, as numbers, a page and advice."""
