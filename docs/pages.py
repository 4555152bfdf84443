"""Pages of the site that are files of the repository: one source for both."""

PAGES = {
    "benchmarks.md": "benchmarks/README.md",
    "project/changes.md": "CHANGELOG.md",
    "project/contributing.md": "CONTRIBUTING.md",
    "project/security.md": "SECURITY.md",
}
