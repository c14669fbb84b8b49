"""The other libraries' quantizers on the demo model; see README.md in this folder."""
