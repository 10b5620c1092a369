# Not verified: see ../README.md.

terraform {
  required_version = ">= 1.6"

  required_providers {
    proxmox = {
      source  = "Telmate/proxmox"
      version = "3.0.2-rc09"
    }
  }

  backend "http" {}
}

# Endpoint and token come from the environment (PM_API_URL, PM_API_TOKEN_ID, PM_API_TOKEN_SECRET).
provider "proxmox" {}
