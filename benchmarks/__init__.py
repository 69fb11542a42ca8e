"""Side-by-side measurements; results/ holds what they printed."""
