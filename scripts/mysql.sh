# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # Some variables are read, others set by scripts/services and the files that source this one.
# What MySQL and MariaDB have in common, sourced by their files of services.d. Each sets
#   mysql_programs=(SERVER CLIENT)   by their names in $dir/bin
# One port speaks plain and TLS. Two logins:
#   root   without a password, from this machine: the administrator, who may do everything
#   alice  TLS only, by the server's own way to check a password, to whom nothing is granted
# Databases and further users are made by the tests, as root.

mysql_user=alice

# mysql_configure [LINE...]: $dir/my.cnf, with further lines for the server.
mysql_configure() {
    choose_ports sql
    cat >"$dir/my.cnf" <<CNF
[mysqld]
datadir = $dir/data
bind_address = 127.0.0.1
port = $(port sql)
socket = $dir/data/socket
pid_file = $dir/data/pid
init_file = $dir/init.sql
ssl_ca = $dir/tls/ca.pem
ssl_cert = $dir/tls/server.pem
ssl_key = $dir/tls/server.pem
# As durable as in production, with a log that replicas and readers of changes could follow: crash tests and
# benchmarks would prove nothing otherwise.
innodb_flush_log_at_trx_commit = 1
sync_binlog = 1
server_id = 1
log_bin = binlog
# Nobody follows it here, and a server that is left up must not fill the disk.
binlog_expire_logs_seconds = 3600
max_connections = 300
innodb_buffer_pool_size = 256M
CNF
    [ $# = 0 ] || printf '%s\n' "$@" >>"$dir/my.cnf"
    # Read at each start, before anybody is let in. A file, so that no command line shows the password.
    (umask 077 && echo "CREATE USER IF NOT EXISTS $mysql_user@'%' IDENTIFIED BY '$(cat "$dir/password")' REQUIRE SSL;" >"$dir/init.sql")
    give "$dir/init.sql"
}

# The release that the data belong to: its patches read each other's.
mysql_release() { "$dir/bin/${mysql_programs[0]}" --version | sed 's/.* Ver \([0-9]*\.[0-9]*\).*/\1/'; }

# mysql_run COMMAND...: starts the server. COMMAND makes the data, of which it is told by --datadir. Another release may
# not be able to read them: then they are made anew.
mysql_run() {
    local release
    release=$(mysql_release)
    if [ ! -d "$dir/data" ] || [ "$(cat "$dir/release" 2>/dev/null)" != "$release" ]; then
        rm -rf "$dir/data" "$dir/data.new"
        data_folder data.new
        quietly "${as_server[@]}" "$@" --datadir="$dir/data.new"
        printf '%s\n' "$release" >"$dir/release"
        mv "$dir/data.new" "$dir/data"
    fi
    # What a killed server leaves there names a pid, which may belong to somebody else by now. Its data it has locked.
    rm -f "$dir"/data/socket* "$dir/data/pid"
    spawn "$dir/bin/${mysql_programs[0]}" --defaults-file="$dir/my.cnf"
}

# The environment and the files of whoever runs the script may have settings for the client.
server_ready() {
    [ "$(timeout 3 env -i "$dir/bin/${mysql_programs[1]}" --no-defaults --protocol=tcp -h 127.0.0.1 -P "$(port sql)" -u root \
        -N -B -e 'SELECT 1' 2>/dev/null)" = 1 ]
}

server_env() {
    local name=OUTBOX_TEST_${server^^}
    echo "$name=mysql://root@127.0.0.1:$(port sql)/mysql"
    echo "${name}_CA=$dir/tls/ca.pem"
    echo "${name}_USER=$mysql_user"
    echo "${name}_PASSWORD=$(cat "$dir/password")"
    # A file, because the pid changes when a test kills the server and starts it again.
    echo "${name}_PID=$dir/pid"
    # For tests that start a server of their own: the folder of its programs, the server and the client among them.
    echo "${name}_BIN=$dir/bin"
}
