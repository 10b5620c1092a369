# The contract of outputs: ../README.md. Every module of this folder gives exactly these.

locals {
  vm  = proxmox_virtual_environment_vm.desktop
  mac = try(lower(local.vm.network_device[0].mac_address), "")
  # The guest's interfaces as its agent tells them; those without an address, and loopback, do not count.
  interfaces = [
    for index, name in local.vm.network_interface_names : {
      mac  = try(lower(local.vm.mac_addresses[index]), "")
      ipv4 = local.vm.ipv4_addresses[index][0]
    }
    if name != "lo" && length(local.vm.ipv4_addresses[index]) > 0
  ]
  # That of the machine's network device, before any that a program in the template has made.
  addresses = concat(
    [for interface in local.interfaces : interface.ipv4 if interface.mac == local.mac],
    [for interface in local.interfaces : interface.ipv4],
  )
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
  value       = try(local.addresses[0], null)
}

output "mac" {
  description = "Hardware address of its network device."
  value       = try(proxmox_virtual_environment_vm.desktop.network_device[0].mac_address, null)
}
