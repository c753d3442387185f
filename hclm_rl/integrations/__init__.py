"""The same terms where others train: adapters for verl and SkyRL. docs/integrations.md says how to switch them on."""
