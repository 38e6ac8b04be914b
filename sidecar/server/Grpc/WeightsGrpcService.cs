using Google.Protobuf;
using Grpc.Core;
using Rollout.Engine;
using Rollout.Kernels;
using Rollout.Server.Hosting;
using Rollout.Server.Weights;
using Rollout.V1;

namespace Rollout.Server.Grpc;

/// <summary>rollout.v1.WeightsService: the weights being served, and the transaction that replaces them.</summary>
[BindServiceMethod(typeof(WeightsBinder), nameof(WeightsBinder.Bind))]
internal sealed class WeightsGrpcService(
    EngineHost host, SharedSegment segment, OpenUpdates open, ILogger<WeightsGrpcService> logger)
    : WeightsService.WeightsServiceBase
{
    public override Task<DescribeReply> Describe(DescribeRequest request, ServerCallContext context)
    {
        RolloutEngine engine = host.Engine;
        (ulong version, IReadOnlyList<DescribedWeight> weights) = engine.Describe();
        DescribeReply reply = new() { Version = version, DigestAlgorithm = TensorDigest.Algorithm };
        foreach (DescribedWeight weight in weights)
        {
            DescribedTensor tensor = new()
            {
                Name = weight.Name,
                Dtype = ManifestConverter.ToWire(weight.Type),
                Digest = ByteString.CopyFrom(weight.Digest),
            };
            foreach (long dimension in weight.Shape) tensor.Shape.Add((ulong)dimension);
            reply.Tensors.Add(tensor);
        }

        return Task.FromResult(reply);
    }

    public override async Task Update(
        IAsyncStreamReader<UpdateRequest> requestStream, IServerStreamWriter<UpdateReply> responseStream, ServerCallContext context)
    {
        OpenMemory memory = OpenMemory.Of(context.GetHttpContext());
        using PartStream stream = new(host.Admitting, segment, memory, requestStream, responseStream);
        JoinUpdate? join;
        await using (UpdateTransaction transaction = new(host.Admitting, open, stream, logger))
            join = await transaction.RunAsync(context.CancellationToken, host.Stopping);
        if (join is not null) await new JoinedPart(open, stream).RunAsync(join, context.CancellationToken);
    }

    public override Task<ReleaseMemoryReply> ReleaseMemory(ReleaseMemoryRequest request, ServerCallContext context)
        => Task.FromResult(new ReleaseMemoryReply { Closed = (uint)OpenMemory.Of(context.GetHttpContext()).Release() });
}
