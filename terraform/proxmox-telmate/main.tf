resource "proxmox_vm_qemu" "desktop" {
  name        = var.hostname
  description = "Mayfly session ${var.session_id}"
  target_node = var.node
  vmid        = var.vm_id
  pool        = var.pool
  tags        = join(",", sort(var.tags))

  clone_id   = var.template_id
  full_clone = false
  # Otherwise fixed pauses of 10 and 5 seconds.
  clone_wait      = 0
  additional_wait = 0

  agent         = 1
  agent_timeout = var.address_timeout_s
  skip_ipv6     = true

  cpu {
    cores = var.cores
  }
  memory = var.memory_mb
  scsihw = "virtio-scsi-single"

  os_type   = "cloud-init"
  ciuser    = var.user
  sshkeys   = var.ssh_public_key
  ipconfig0 = "ip=dhcp"
  ciupgrade = false
  onboot    = false
  vm_state  = "running"

  disks {
    scsi {
      scsi0 {
        disk {
          storage = var.storage
          size    = "${coalesce(var.disk_gb, 32)}G"
          discard = true
        }
      }
    }
    ide {
      # Without it the provider takes the template's cloud-init drive away.
      ide2 {
        cloudinit {
          storage = var.storage
        }
      }
    }
  }

  network {
    id       = 0
    model    = "virtio"
    bridge   = var.bridge
    firewall = true
  }
}
