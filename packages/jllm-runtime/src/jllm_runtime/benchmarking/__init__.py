"""What a model reaches on a device: prefill and decode rates, beside what the device could do at best."""
