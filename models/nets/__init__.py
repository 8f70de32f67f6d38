"""Networks, one file each; torch is at home here."""
