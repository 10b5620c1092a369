# The contract of outputs: ../README.md. Every module of this folder gives exactly these.

locals {
  # The guest's interfaces as its agent names them. The one of the machine's network device counts: others may be a container's.
  mac = lower(proxmox_virtual_environment_vm.desktop.network_device[0].mac_address)
  addresses = {
    for index, name in proxmox_virtual_environment_vm.desktop.network_interface_names :
    name => proxmox_virtual_environment_vm.desktop.ipv4_addresses[index]
    if try(lower(proxmox_virtual_environment_vm.desktop.mac_addresses[index]), "") == local.mac
    && length(proxmox_virtual_environment_vm.desktop.ipv4_addresses[index]) > 0
  }
}

output "vm_id" {
  description = "The machine's number."
  value       = proxmox_virtual_environment_vm.desktop.vm_id
}

output "name" {
  description = "The machine's name."
  value       = proxmox_virtual_environment_vm.desktop.name
}

output "node" {
  description = "The node that it was made on."
  value       = proxmox_virtual_environment_vm.desktop.node_name
}

output "ipv4" {
  description = "Its address, without a prefix length."
  value       = try(values(local.addresses)[0][0], null)
}

output "mac" {
  description = "Hardware address of its network device."
  value       = try(proxmox_virtual_environment_vm.desktop.network_device[0].mac_address, null)
}
