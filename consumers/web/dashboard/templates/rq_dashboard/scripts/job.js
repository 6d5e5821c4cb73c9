(function ($) {
    var job_id = {{ id|tojson }};

    // As text throughout: none of it may be taken for HTML.
    var fill = function (id, facts) {
        var $table = $('#' + id).empty();
        $table.parent().toggle(facts.length > 0);
        $.each(facts, function (_, fact) {
            $('<tr>').append($('<th scope="row" class="w-25">').text(fact[0]),
                $('<td class="text-break">').text(fact[1])).appendTo($table);
        });
    };

    var show = function (job) {
        $('#job-title').text(job.title);
        $('#job-failed').toggle(job.reason !== null);
        $('#job-reason').text(job.reason || '');
        $('#job-trace').toggle(job.traceback !== null);
        $('#job-traceback').text(job.traceback || '');
        $('#job-text').text(job.text);
        $('#requeue-job-btn').toggle(job.status === 'failed');
        fill('job-data', job.data);
        fill('job-event', job.event);
        fill('job-job', job.job);
    };

    var refresh = function () {
        var again = function () { setTimeout(refresh, POLL_INTERVAL); };
        if (!AUTOREFRESH_FLAG) return again();
        api.getJob(job_id, function (job, error) {
            if (!error) show(job);
            again();
        });
    };
    $('#job-data, #job-event, #job-job').parent().hide();  // until there is something to show
    $(document).ready(refresh);

    $('#delete-job-btn').click(function () {
        modalConfirm('delete job', function () {
            $.post(url_for('delete_job', job_id), {}, function () {
                $(location).attr('href', url_for('queues_view'));
            });
        });
        return false;
    });

    $('#requeue-job-btn').click(function () {
        $.post(url_for('requeue_job', job_id), {}, function () { $('#requeue-job-btn').hide(); });
        return false;
    });
})($);
