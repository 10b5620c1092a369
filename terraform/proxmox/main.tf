resource "proxmox_virtual_environment_vm" "desktop" {
  name        = var.hostname
  description = "Mayfly session ${var.session_id}"
  node_name   = var.node
  vm_id       = var.vm_id
  pool_id     = var.pool
  # Proxmox VE sorts them; another order would be a difference for ever.
  tags = sort(var.tags)

  on_boot = false
  started = true
  # Nothing of a desktop is worth a shutdown: the guest is asked by its agent before.
  stop_on_destroy                      = true
  purge_on_destroy                     = true
  delete_unreferenced_disks_on_destroy = true

  scsi_hardware = "virtio-scsi-single"

  clone {
    vm_id     = var.template_id
    node_name = coalesce(var.template_node, var.node)
    full      = false
    # Of the request alone: a clone whose task fails is told to the person.
    retries = 3
  }

  agent {
    enabled = true
    # Without one in time the apply succeeds all the same, and the output ipv4 is null.
    timeout = "${var.address_timeout_s}s"
    wait_for_ip {
      ipv4 = true
    }
  }

  cpu {
    cores = var.cores
    type  = "x86-64-v2-AES"
  }

  memory {
    dedicated = var.memory_mb
  }

  network_device {
    bridge   = var.bridge
    firewall = true
  }

  # Only to enlarge: a block for a cloned disk sets every option of it that the block does not name back to a default.
  dynamic "disk" {
    for_each = var.disk_gb == null ? [] : [var.disk_gb]
    content {
      interface    = "scsi0"
      datastore_id = var.storage
      size         = disk.value
      discard      = "on"
      iothread     = true
    }
  }

  initialization {
    datastore_id = var.storage
    interface    = "ide2"
    # Otherwise the first boot installs every update there is.
    upgrade = false

    ip_config {
      ipv4 {
        address = "dhcp"
      }
    }

    user_account {
      username = var.user
      keys     = [var.ssh_public_key]
    }
  }

  # Of all that makes a clone, the wait for its address too: the provider counts no part by itself.
  timeout_clone    = 120 + var.address_timeout_s
  timeout_start_vm = 120
  timeout_stop_vm  = 120
}
