"""Operations on feature maps that networks are made of, tuned for each platform; `reference` is what they compute."""
