"""The command line: one file per verb, each with a function of the verb's name."""
