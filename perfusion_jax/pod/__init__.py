"""Many chips and hosts: meshes, stacked slots, memory, processes, and reports of compiled programs.

Knows nothing of Perfusion.
"""
