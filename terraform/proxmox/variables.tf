# The contract of inputs: ../README.md. Every module of this folder takes exactly these.

variable "session_id" {
  description = "The session that the desktop is made for; written into the machine's description."
  type        = string
}

variable "hostname" {
  description = "Name of machine and host: desktop- and 7 hexadecimal digits. One more, and two names can share a NetBIOS name."
  type        = string

  validation {
    condition     = can(regex("^desktop-[0-9a-f]{7}$", var.hostname))
    error_message = "The hostname must be desktop- and 7 hexadecimal digits."
  }
}

variable "node" {
  description = "The node that the machine is made on."
  type        = string
}

variable "vm_id" {
  description = "The machine's number. Given, never chosen by the provider: Proxmox VE reserves none."
  type        = number

  validation {
    condition     = var.vm_id >= 100 && var.vm_id <= 999999999
    error_message = "Proxmox VE numbers machines from 100 to 999999999."
  }
}

variable "template_id" {
  description = "Number of the template that is cloned."
  type        = number
}

variable "template_node" {
  description = "The node that the template is on; null: the same."
  type        = string
  default     = null
}

variable "storage" {
  description = "Storage of the cloud-init drive. A linked clone's disk stays on the template's."
  type        = string
}

variable "bridge" {
  description = "The network bridge."
  type        = string
  default     = "vmbr2"
}

variable "pool" {
  description = "The pool that the machine belongs to, so that a token can be limited to it; null: none."
  type        = string
  default     = null
}

variable "tags" {
  description = "Tags of the machine, by which the reaper knows its own."
  type        = list(string)
  default     = ["mayfly"]
}

variable "cores" {
  description = "Virtual processors."
  type        = number
  default     = 2
}

variable "memory_mb" {
  description = "Memory in MiB."
  type        = number
  default     = 4096
}

variable "disk_gb" {
  description = "Size of the disk in GiB, if the template's is smaller; null: the template's."
  type        = number
  default     = null
}

variable "address_timeout_s" {
  description = "So long the machine's guest agent is waited for to tell its address, in seconds."
  type        = number
  default     = 120
}

variable "user" {
  description = "The account that Ansible logs in with; cloud-init makes it."
  type        = string
  default     = "mayfly"
}

variable "ssh_public_key" {
  description = "The key that Ansible logs in with, as in authorized_keys."
  type        = string
}
