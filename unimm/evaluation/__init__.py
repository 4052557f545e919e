"""Pure scorers: answers, GenEval rules, image metrics, codebook statistics. No model is loaded here."""
