# What the module asks the provider for. The provider's schema is the real one; its answers are made up.

mock_provider "proxmox" {}

variables {
  session_id     = "01999999-0000-7000-8000-000000000001"
  hostname       = "desktop-00000ff"
  node           = "pve1"
  vm_id          = 10255
  template_id    = 9000
  storage        = "local-lvm"
  pool           = "mayfly"
  tags           = ["mayfly", "desktop"]
  ssh_public_key = "ssh-ed25519 AAAA mayfly"
}

run "a_desktop_is_a_linked_clone_with_the_size_and_network_of_the_prototype" {
  override_resource {
    target = proxmox_virtual_environment_vm.desktop
    values = {
      network_interface_names = ["lo", "eth0"]
      ipv4_addresses          = [["127.0.0.1"], ["192.0.2.17"]]
    }
  }

  assert {
    condition     = !proxmox_virtual_environment_vm.desktop.clone[0].full && proxmox_virtual_environment_vm.desktop.clone[0].vm_id == 9000
    error_message = "It must be a linked clone of the template."
  }
  assert {
    condition     = proxmox_virtual_environment_vm.desktop.cpu[0].cores == 2 && proxmox_virtual_environment_vm.desktop.memory[0].dedicated == 4096
    error_message = "It must have two processors and 4 GiB."
  }
  assert {
    condition     = proxmox_virtual_environment_vm.desktop.network_device[0].bridge == "vmbr2" && proxmox_virtual_environment_vm.desktop.network_device[0].firewall
    error_message = "It must be on vmbr2 behind the firewall."
  }
  assert {
    condition     = !proxmox_virtual_environment_vm.desktop.initialization[0].upgrade
    error_message = "The first boot must not install updates."
  }
  assert {
    condition     = length(proxmox_virtual_environment_vm.desktop.disk) == 0
    error_message = "A disk that need not grow must not be touched."
  }
  assert {
    condition     = proxmox_virtual_environment_vm.desktop.tags == tolist(["desktop", "mayfly"])
    error_message = "Tags must be sorted."
  }
  assert {
    condition     = proxmox_virtual_environment_vm.desktop.agent[0].timeout == "120s" && proxmox_virtual_environment_vm.desktop.timeout_clone == 240
    error_message = "The time for a clone must hold the wait for its address."
  }
  assert {
    condition     = output.ipv4 == "192.0.2.17" && output.vm_id == 10255 && output.name == "desktop-00000ff" && output.node == "pve1"
    error_message = "The outputs must name the machine, and not its loopback address."
  }
}

run "a_small_template_is_enlarged" {
  command = plan
  variables {
    disk_gb = 32
  }
  assert {
    condition     = proxmox_virtual_environment_vm.desktop.disk[0].size == 32 && proxmox_virtual_environment_vm.desktop.disk[0].interface == "scsi0"
    error_message = "The first disk must have 32 GiB."
  }
}

run "a_name_that_could_steal_an_account_is_refused" {
  command = plan
  variables {
    hostname = "desktop-00000fff"
  }
  expect_failures = [var.hostname]
}

run "a_number_that_proxmox_does_not_take_is_refused" {
  command = plan
  variables {
    vm_id = 99
  }
  expect_failures = [var.vm_id]
}
