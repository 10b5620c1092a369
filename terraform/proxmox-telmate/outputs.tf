# The contract of outputs: ../README.md.

output "vm_id" {
  description = "The machine's number."
  value       = proxmox_vm_qemu.desktop.vmid
}

output "name" {
  description = "The machine's name."
  value       = proxmox_vm_qemu.desktop.name
}

output "node" {
  description = "The node that it was made on."
  value       = proxmox_vm_qemu.desktop.target_node
}

output "ipv4" {
  description = "Its address, without a prefix length."
  value       = proxmox_vm_qemu.desktop.default_ipv4_address
}

output "mac" {
  description = "Hardware address of its network device."
  value       = try(proxmox_vm_qemu.desktop.network[0].macaddr, null)
}
