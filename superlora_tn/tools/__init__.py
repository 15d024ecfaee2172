"""Uses of the library that nothing below imports: drawings, geometry, measurements."""
