using Google.Protobuf;
using Grpc.Core;
using Rollout.Engine;
using Rollout.Kernels;
using Rollout.V1;

namespace Rollout.Server.Weights;

/// <summary>NCCL, which is not implemented: malformed messages are reported as such.</summary>
internal sealed class NcclTransport(Backend backend) : ITransport
{
    private const int UniqueIdBytes = 128; // ncclUniqueId
    private const int DeviceUuidBytes = 16;

    public PayloadSource SourceOf(UpdateRequest message, WeightUpdate update)
    {
        CheckLength("unique_id", message.Nccl.UniqueId, UniqueIdBytes);
        if (message.Nccl.DeviceUuid.Length > 0) CheckLength("device_uuid", message.Nccl.DeviceUuid, DeviceUuidBytes);
        string instead = backend.Peers is null ? "" : "cuda_ipc, ";
        throw new RpcException(new Status(StatusCode.Unimplemented,
            $"this server, on {backend.Name}, does not receive nccl: send {instead}chunk, shared_memory or file"));
    }

    public void Dispose()
    {
    }

    private static void CheckLength(string field, ByteString value, int bytes)
    {
        if (value.Length != bytes)
            throw new UpdateFailedException(UpdateFailure.Protocol, $"nccl {field} has {value.Length} bytes, it must have {bytes}");
    }
}
