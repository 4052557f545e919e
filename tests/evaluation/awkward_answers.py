"""Answers that the recorded cases lack, and what lmms-eval 0.7.3 reads from them (tests/integrations asks it again)."""

MME = {"Y.": "yes", "n.": "no", "Ye.s": "yes", "y. e.s": "other"}
MMMU = {"B,": "B", "B!": "B", "'C'": "C", "A (B)": "B", "D or (C)": "C", "DNA is it": "A", "it is DNA.": "A"}
OPTIONS = {"A": "1 cm", "B": "2 cm", "C": "3 cm", "D": "4 cm"}
POPE_SCRIPT = {"no, sir": "no", "oh,no": "yes"}
"""By the text of POPE's own script: commas are deleted, words lie between single blanks."""
