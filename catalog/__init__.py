"""What exists: areas, the grid, sources, scenes, and lazy cubes of them on the grid."""
