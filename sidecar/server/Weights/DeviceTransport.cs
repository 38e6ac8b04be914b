using Google.Protobuf;
using Grpc.Core;
using Rollout.Engine;
using Rollout.V1;

namespace Rollout.Server.Weights;

/// <summary>CUDA IPC and NCCL without a CUDA device: malformed messages are reported as such, others as not implemented.</summary>
internal sealed class DeviceTransport(RolloutEngine engine) : ITransport
{
    private const int IpcHandleBytes = 64;   // cuIpcMemHandle
    private const int NcclIdBytes = 128;     // ncclUniqueId
    private const int DeviceUuidBytes = 16;

    public PayloadSource SourceOf(UpdateRequest message, WeightUpdate update)
    {
        if (message.StepCase == UpdateRequest.StepOneofCase.CudaIpc)
        {
            for (int i = 0; i < message.CudaIpc.Allocations.Count; i++)
            {
                CudaAllocation allocation = message.CudaIpc.Allocations[i];
                CheckLength($"cuda_ipc allocations[{i}]: handle", allocation.Handle, IpcHandleBytes);
                CheckLength($"cuda_ipc allocations[{i}]: device_uuid", allocation.DeviceUuid, DeviceUuidBytes);
            }
        }
        else
        {
            CheckLength("nccl: unique_id", message.Nccl.UniqueId, NcclIdBytes);
            if (message.Nccl.DeviceUuid.Length > 0) CheckLength("nccl: device_uuid", message.Nccl.DeviceUuid, DeviceUuidBytes);
        }

        string name = message.StepCase == UpdateRequest.StepOneofCase.CudaIpc ? "cuda_ipc" : "nccl";
        throw new RpcException(new Status(StatusCode.Unimplemented,
            $"{name} needs a CUDA device, and this server runs on {engine.Backend.Name}: send chunk, shared_memory or file"));
    }

    public void Dispose()
    {
    }

    private static void CheckLength(string field, ByteString value, int bytes)
    {
        if (value.Length != bytes)
            throw new UpdateFailedException(UpdateFailure.Protocol, $"{field} has {value.Length} bytes, it must have {bytes}");
    }
}
