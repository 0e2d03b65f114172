"""What holds for every test."""

import signal

# A shell that runs the suite in the background makes it ignore Ctrl-C, and the programs that tests start inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
