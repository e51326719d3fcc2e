"""From images to classes: label maps, scores on a data set, files and videos, and what is drawn of them."""
