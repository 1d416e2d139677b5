"""What a network computes, in torch: targets, the shared draft, private modules, LoRAs."""
