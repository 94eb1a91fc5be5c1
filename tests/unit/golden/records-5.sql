PRAGMA user_version = 5;
BEGIN TRANSACTION;
CREATE TABLE events (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        at REAL NOT NULL,
        kind TEXT NOT NULL,
        vm_id TEXT,
        name TEXT NOT NULL,
        data BLOB NOT NULL
    ) STRICT;
INSERT INTO "events" VALUES(1,1.79562628306584763527e+09,'vm.created','22222222222222222222222222222222','web',CAST('{"image":"debian:13"}' AS BLOB));
CREATE TABLE image_names (
        name TEXT PRIMARY KEY,
        image_id TEXT NOT NULL REFERENCES images(id) ON DELETE CASCADE
    ) STRICT;
INSERT INTO "image_names" VALUES('debian:13','11111111111111111111111111111111');
INSERT INTO "image_names" VALUES('debian:latest','11111111111111111111111111111111');
CREATE TABLE images (
        id TEXT PRIMARY KEY,
        created_at REAL NOT NULL,
        record BLOB NOT NULL
    ) STRICT;
INSERT INTO "images" VALUES('11111111111111111111111111111111',1000.5,CAST('{"id":"11111111111111111111111111111111","name":"debian:13","arch":"x86_64","created_at":1000.5,"source":"build","sha256":"eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee","disks":[{"name":"root","size":1073741824,"layer":"base","blob":null,"bus":"virtio","media":"disk"}],"firmware":"kernel","firmwares":["kernel","uefi"],"kernel":"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa","initrd":null,"cmdline":"quiet","nvram":null,"copy":false,"machine":null,"memory":null,"display":true,"guest":{"agent":true,"seed":"nocloud"},"tags":["debian:latest"],"description":"","labels":{"recipe":"debian:13"}}' AS BLOB));
CREATE TABLE layers (id TEXT PRIMARY KEY, record BLOB NOT NULL) STRICT;
INSERT INTO "layers" VALUES('base',CAST('{"id":"base","virtual_size":1073741824,"file_size":4096,"sha256":"dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd","parent":null,"merged":[]}' AS BLOB));
CREATE TABLE networks (
        id TEXT PRIMARY KEY,
        name TEXT NOT NULL UNIQUE,
        created_at REAL NOT NULL,
        record BLOB NOT NULL
    ) STRICT;
CREATE TABLE nics (
        vm_id TEXT NOT NULL REFERENCES vms(id) ON DELETE CASCADE,
        network_id TEXT NOT NULL REFERENCES networks(id),
        nic TEXT NOT NULL,
        mac TEXT NOT NULL,
        address TEXT NOT NULL, security_groups TEXT NOT NULL DEFAULT '', rate INTEGER NOT NULL DEFAULT 0,
        PRIMARY KEY (network_id, address),
        UNIQUE (network_id, mac)
    ) STRICT;
CREATE TABLE operations (
        id TEXT PRIMARY KEY,
        subject TEXT NOT NULL,
        state TEXT NOT NULL,
        created_at REAL NOT NULL,
        record BLOB NOT NULL
    ) STRICT;
INSERT INTO "operations" VALUES('33333333333333333333333333333333','22222222222222222222222222222222','stuck',2002.0,CAST('{"id":"33333333333333333333333333333333","verb":"stop","subject":"22222222222222222222222222222222","subject_name":"web","request":{"vm_id":"22222222222222222222222222222222","timeout":1.5},"state":"stuck","owner":{"pid":7,"start_time":9,"boot_id":"boot"},"created_at":2002,"steps":[{"name":"ask","state":"done","error":""},{"name":"wait","state":"undo-failed","error":"no answer"}],"notes":{"asked":["agent"]},"error":"no answer","finished_at":null,"cancel_requested":true}' AS BLOB));
CREATE TABLE ports (
        vm_id TEXT NOT NULL REFERENCES vms(id) ON DELETE CASCADE,
        host_address TEXT NOT NULL,
        host_port INTEGER NOT NULL,
        protocol TEXT NOT NULL,
        PRIMARY KEY (host_address, host_port, protocol)
    ) STRICT;
INSERT INTO "ports" VALUES('22222222222222222222222222222222','127.0.0.1',8080,'tcp');
CREATE TABLE security_groups (
        name TEXT PRIMARY KEY,
        created_at REAL NOT NULL,
        record BLOB NOT NULL
    ) STRICT;
CREATE TABLE snapshots (
        id TEXT PRIMARY KEY,
        vm_id TEXT NOT NULL,
        name TEXT NOT NULL,
        created_at REAL NOT NULL,
        record BLOB NOT NULL,
        UNIQUE (vm_id, name)
    ) STRICT;
INSERT INTO "snapshots" VALUES('55555555555555555555555555555555','22222222222222222222222222222222','clean',1700000100.0,CAST('{"id":"55555555555555555555555555555555","name":"clean","vm_id":"22222222222222222222222222222222","vm_name":"web","image":"debian:13","created_at":1700000100.0,"spec":{"arch":"x86_64","machine":"q35","machine_type":"pc-q35-10.0","accelerator":"auto","cpu":{"count":2,"maximum":4,"model":"default","sockets":1,"threads":1},"memory":536870912,"boot":{"firmware":"kernel","kernel":"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa","initrd":null,"cmdline":"quiet","rom":null},"disks":[{"name":"root","size":1073741824,"layer":"base","head":"","blob":null,"bus":"virtio","media":"disk"},{"name":"cd0","size":1,"layer":null,"head":"","blob":"ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff","bus":"virtio","media":"cdrom"}],"nics":[{"name":"net0","mac":"52:54:00:00:00:01","model":"virtio","ports":[{"host_port":8080,"guest_port":80,"host_address":"127.0.0.1","protocol":"tcp"}],"restrict":false,"network":null,"address":null,"groups":[],"limit":0}],"display":"vga","guest":{"agent":false,"seed":"none"},"seed":{"user":"me","password_hash":null,"ssh_keys":["ssh-ed25519 AAAA"],"user_data":null},"addresses":{"disk-root":"0x3"},"clock":"utc","isolation":"standard"},"parent":null,"message":"before ''all'' that","memory":{"id":"66666666666666666666666666666666","file_size":4096,"accelerator":"tcg","running":true,"shared":false,"volatile":false},"nvram":null,"quiesced":false,"seeded":true}' AS BLOB));
CREATE TABLE vms (
        id TEXT PRIMARY KEY,
        name TEXT NOT NULL UNIQUE,
        created_at REAL NOT NULL,
        throwaway INTEGER NOT NULL,
        record BLOB NOT NULL
    ) STRICT;
INSERT INTO "vms" VALUES('22222222222222222222222222222222','web',2000.25,1,CAST('{"id":"22222222222222222222222222222222","name":"web","image":"debian:13","created_at":2000.25,"spec":{"arch":"x86_64","machine":"q35","machine_type":"pc-q35-10.0","accelerator":"auto","cpu":{"count":2,"maximum":4,"model":"default","sockets":1,"threads":1},"memory":536870912,"boot":{"firmware":"kernel","kernel":"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa","initrd":null,"cmdline":"quiet","rom":null},"disks":[{"name":"root","size":1073741824,"layer":"base","head":"","blob":null,"bus":"virtio","media":"disk"},{"name":"cd0","size":1,"layer":null,"head":"","blob":"ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff","bus":"virtio","media":"cdrom"}],"nics":[{"name":"net0","mac":"52:54:00:00:00:01","model":"virtio","ports":[{"host_port":8080,"guest_port":80,"host_address":"127.0.0.1","protocol":"tcp"}],"restrict":false,"network":null,"address":null,"groups":[],"limit":0}],"display":"vga","guest":{"agent":false,"seed":"none"},"seed":{"user":"me","password_hash":null,"ssh_keys":["ssh-ed25519 AAAA"],"user_data":null},"addresses":{"disk-root":"0x3"},"clock":"utc","isolation":"standard"},"pending":{"arch":"x86_64","machine":"q35","machine_type":"pc-q35-10.0","accelerator":"auto","cpu":{"count":2,"maximum":4,"model":"default","sockets":1,"threads":1},"memory":2147483648,"boot":{"firmware":"kernel","kernel":"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa","initrd":null,"cmdline":"quiet","rom":null},"disks":[{"name":"root","size":1073741824,"layer":"base","head":"","blob":null,"bus":"virtio","media":"disk"},{"name":"cd0","size":1,"layer":null,"head":"","blob":"ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff","bus":"virtio","media":"cdrom"}],"nics":[{"name":"net0","mac":"52:54:00:00:00:01","model":"virtio","ports":[{"host_port":8080,"guest_port":80,"host_address":"127.0.0.1","protocol":"tcp"}],"restrict":false,"network":null,"address":null,"groups":[],"limit":0}],"display":"vga","guest":{"agent":false,"seed":"none"},"seed":{"user":"me","password_hash":null,"ssh_keys":["ssh-ed25519 AAAA"],"user_data":null},"addresses":{"disk-root":"0x3"},"clock":"utc","isolation":"standard"},"run":{"pid":7,"start_time":9,"boot_id":"boot","started_at":2001,"accelerator":"tcg","qemu_version":"10.0.2","isolation":null,"start_count":3,"from_memory":false},"last_exit":{"at":1999,"reason":"guest-shutdown","detail":"the guest powered itself off","last_lines":"bye\n日本"},"seeded":true,"pool":null,"snapshot":null,"suspended":null,"labels":{"team":"größe 🐧"},"remove_when_stopped":true}' AS BLOB));
CREATE INDEX vms_throwaway ON vms(throwaway) WHERE throwaway;
CREATE INDEX ports_by_vm ON ports(vm_id);
CREATE INDEX operations_by_state ON operations(state);
CREATE INDEX operations_by_time ON operations(created_at);
CREATE INDEX nics_by_vm ON nics(vm_id);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('events',1);
COMMIT;
