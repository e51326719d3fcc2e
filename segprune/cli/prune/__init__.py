"""`segprune prune`, and prune_train.py: prune a checkpoint; with data, score it before and after, and fine-tune it.

flags.py    the flags, beside those of the library's PruneOptions
command.py  the run, in the order in which things happen
search.py   the search for --max_drop, its trials shown as they come
closing.py  the record that is saved and the table that is printed at the end
"""
