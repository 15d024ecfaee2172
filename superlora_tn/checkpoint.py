"""Old name of `superlora_tn.files.own`: the same module, so that what is said of one holds for the other."""

import sys

from superlora_tn.files import own

sys.modules[__name__] = own
