using Grpc.Core;
using Rollout.Engine;
using Rollout.Server.Hosting;
using Rollout.V1;
using Problem = Rollout.Engine.Problem;

namespace Rollout.Server.Grpc;

/// <summary>rollout.v1.RolloutService: generation, scores and aborts.</summary>
internal sealed class RolloutGrpcService(EngineHost host, ILogger<RolloutGrpcService> logger) : RolloutService.RolloutServiceBase
{
    public override async Task Generate(
        GenerateRequest request, IServerStreamWriter<GenerateReply> responseStream, ServerCallContext context)
    {
        CancellationToken cancellation = context.CancellationToken;
        await using GroupCall call = Start(request);
        await foreach (GenerateReply reply in call.ReadAsync(cancellation)) await responseStream.WriteAsync(reply, cancellation);
        call.ThrowIfFaulted();
    }

    public override Task GenerateBatch(
        IAsyncStreamReader<GenerateRequest> requestStream, IServerStreamWriter<GenerateReply> responseStream, ServerCallContext context)
        => new BatchCall(Start, responseStream, logger).RunAsync(requestStream, host.Stopping, context.CancellationToken);

    public override Task<ScoreReply> Score(ScoreRequest request, ServerCallContext context)
        => GroupCall.ScoreAsync(host.Admitting, request, context.CancellationToken);

    public override async Task<AbortReply> Abort(AbortRequest request, ServerCallContext context)
    {
        IReadOnlyCollection<string>? ids = request.WhichCase switch
        {
            AbortRequest.WhichOneofCase.Ids => request.Ids.Ids,
            AbortRequest.WhichOneofCase.All when request.All => null,
            AbortRequest.WhichOneofCase.All => throw Invalid("all", "must be true; name the ids to end only some groups"),
            _ => throw Invalid("which", "either ids or all must be given"),
        };
        AbortCounts counts = await host.Engine.AbortAsync(ids);
        Log.Aborted(logger, counts.Groups, counts.Samples, counts.Unknown.Count);
        return new AbortReply { Groups = (uint)counts.Groups, Samples = (uint)counts.Samples, Unknown = { counts.Unknown } };
    }

    private GroupCall Start(GenerateRequest request)
    {
        UnknownFields.Refuse(request);
        GroupCall call = GroupCall.Start(host.Admitting, request);
        Log.GroupStarted(logger, call.Request.Id, call.Request.Prompt.Length, call.Request.N);

        // Stop() closes admissions before it aborts what is in flight; a group that slipped in between the two is ended here.
        if (host.Stopping.IsCancellationRequested) _ = call.AbortAsync();
        return call;
    }

    private static InvalidRequestException Invalid(string field, string message) => new([new Problem(field, message)]);
}
