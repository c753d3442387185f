"""From a recipe's words to objects, and what is refused."""
