// Empty in a folder of files. `fastsae serve` answers for this file with a line that sets fastsae.server = true.
