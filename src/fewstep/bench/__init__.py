"""What `fewstep bench` measures: the training loop and the sampler against the bare network calls and the device."""
