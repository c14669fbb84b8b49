"""What the position of a slot says: where its token stands, or that there is none."""

PADDING = -1  # the position of a slot that nothing may attend to
