"""What a recipe and flags may say, and how they are read, checked and explained."""
