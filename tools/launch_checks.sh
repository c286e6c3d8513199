# What the scripts that start several processes look at first; they source it.

# fail MESSAGE
fail() {
    echo "$(basename "$0"): error: $1" >&2
    exit 2
}

# check_number NAME VALUE SMALLEST
check_number() {
    if ! [[ $2 =~ ^[0-9]{1,9}$ ]] || (("10#$2" < $3)); then
        fail "$1 must be a whole number of $3 or more, got '$2'."
    fi
}

# check_processes GPUS: of torch.distributed.run, and the variables that set it up
check_processes() {
    # It knows these words for "as many as there are".
    [[ $1 =~ ^(auto|cpu|gpu)$ ]] || check_number GPUS "$1" 1
    # A range means that processes may come and go.
    [[ ${NNODES:-1} =~ ^[1-9][0-9]*:[1-9][0-9]*$ ]] || check_number NNODES "${NNODES:-1}" 1
    check_number NODE_RANK "${NODE_RANK:-0}" 0
    check_number PORT "${PORT:-29500}" 1
    local reason
    # The first machine listens there. Binding disturbs nobody, connecting might.
    if ((10#${NODE_RANK:-0} == 0)) && ! reason=$(python -c 'import os, socket, sys
with socket.socket() as s:
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        s.bind(("", int(sys.argv[1])))
    except OSError as error:
        sys.exit(os.strerror(error.errno))
    except OverflowError:
        sys.exit("the last is 65535")' "${PORT:-29500}" 2>&1); then
        fail "the port ${PORT:-29500} cannot be used: $reason. Choose another: PORT=29501 $0 ..."
    fi
}
