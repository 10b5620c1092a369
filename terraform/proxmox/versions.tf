terraform {
  required_version = ">= 1.6"

  required_providers {
    proxmox = {
      source = "bpg/proxmox"
      # Exactly: before its 1.0 the provider changes names between minor versions.
      version = "0.111.1"
    }
  }

  # One state for each desktop. The orchestrator serves it and gives the address and the lock's by the environment
  # (TF_HTTP_*), so that no secret is in a file.
  backend "http" {}
}

# Endpoint, token and trust come from the environment (PROXMOX_VE_ENDPOINT, PROXMOX_VE_API_TOKEN, PROXMOX_VE_INSECURE).
provider "proxmox" {}
