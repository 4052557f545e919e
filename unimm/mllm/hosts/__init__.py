"""The hosts that an image tokenizer can be attached to. Importing this package registers every family."""

from unimm.registration import import_below

import_below(__name__)
