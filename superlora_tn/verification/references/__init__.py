"""What claims are held against: textbook formulas, papers, and the real code of TensorLy, PEFT and LyCORIS."""
