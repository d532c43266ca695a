"""mrjax: train brain-MRI reconstruction models in JAX."""
